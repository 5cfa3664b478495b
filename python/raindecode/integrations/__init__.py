"""Plug-ins for other stacks. Each module imports its stack when it is imported, never before."""
