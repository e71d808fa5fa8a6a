"""The command `obr`: arguments parsed, a stage called."""
