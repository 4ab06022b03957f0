"""What a row is, how it is written down, and what survives a crash. Knows neither handlers nor brokers."""
