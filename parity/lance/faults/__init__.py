"""Ways to be wrong: a catalogue of faults that break lance_mlx in one component each, and whole implementations' sets.

`load_fault` gives one by name; a fault's patch, given the Target, is a context manager that breaks and mends it.
"""

from parity.lance.faults.base import Fault, Patch, Target
from parity.lance.faults.loading import CATALOGUE, combined, load_fault
from parity.lance.faults.profiles import PROFILES, Profile

__all__ = [
    "CATALOGUE",
    "PROFILES",
    "Fault",
    "Patch",
    "Profile",
    "Target",
    "combined",
    "load_fault",
]
