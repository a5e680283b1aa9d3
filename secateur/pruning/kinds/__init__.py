"""What a run can be: one file a kind of job. `pipeline.KINDS` is the table of them."""
