"""The verdict: gates, tests against the bound and against controls, and the record of what was found."""
