"""Thin modules that put the methods into other stacks, one per stack. Each imports its stack when it is imported itself."""
