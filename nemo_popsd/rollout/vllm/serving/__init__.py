"""What runs in vLLM's environment. The modules import each other by their bare names and nothing else of this package:
only this folder is on the server's path. `popsd_wire` is used on both sides.
"""
