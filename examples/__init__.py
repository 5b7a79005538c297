"""Programs: quickstart, training programs, the tables and figures of the paper."""
