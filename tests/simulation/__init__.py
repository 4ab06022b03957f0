"""The real worker code on a virtual clock against model brokers: thousands of seeds, each repeatable."""
