"""What is left behind of a graph, for people: readable files, a script that runs the pass on it
again, and artifacts in torch's structured trace."""

from .trail import Trail, check_folder

__all__ = ["Trail", "check_folder"]
