"""What users import through `parflow`: datasets, values, tasks, workflows and runs."""
