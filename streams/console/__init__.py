"""The console: a Faust application that watches and steers every session of a broker, in the browser.

It only reads topics and calls what the command line calls; no worker notices whether it runs (law: never on the data
path). Nothing below this package imports it.
"""
