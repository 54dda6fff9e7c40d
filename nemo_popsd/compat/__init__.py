"""Differences between the supported versions of a library, one module per library, and the table of versions.

Code elsewhere calls these modules and contains no comparison of versions.
"""
