// Runs before anything is drawn, so that a dark page never flashes white. The choice is kept in this browser.
try {
  const theme = localStorage.getItem("rowmill-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage may be forbidden: then the system's theme it is.
}
