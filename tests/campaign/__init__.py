"""The campaign of reliability: faults on purpose, thousands of them, and a table of what became of them.

`make campaign` runs all of it; docs/reliability.md says what is promised and has the table.
"""
