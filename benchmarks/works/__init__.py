"""The works P1 to P11 of the issue, one file each; each file says what is compared and how it is checked."""
