"""What shows: history turned into numbers, text and pages."""
