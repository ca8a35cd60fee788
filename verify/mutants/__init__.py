"""Mutants: deliberate defects of a target, each of which a property must catch.

A mutant is loaded like a target, as `impl@NAME`, and needs no more than its name in any process.
"""

from verify.mutants.catalogue import CATALOGUE, AnyMutant, find
from verify.mutants.mutant import Mutant
from verify.mutants.private import PrivateCopies, import_mutated

__all__ = ["CATALOGUE", "AnyMutant", "Mutant", "PrivateCopies", "find", "import_mutated"]
