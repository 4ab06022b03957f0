"""Brokers, partition tasks, workers, runs and the command line: everything that knows of topics."""
