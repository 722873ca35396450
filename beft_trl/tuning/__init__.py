"""The search for the settings of a run by the loss on rows that it does not learn from."""
