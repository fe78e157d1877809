"""`tsdkd compare`: methods x seeds on one pair and the same prompts, resumable, with a table, a plot and a test."""
