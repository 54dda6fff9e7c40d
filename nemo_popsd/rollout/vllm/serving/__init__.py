"""Modules that run in vLLM's environment. They import each other by their bare names and nothing else of this package,
because only this folder is on the server's path. `popsd_wire` is used on both sides.
"""
