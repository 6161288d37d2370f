"""The trial of the kernels on the machine that they run on: see session.py."""

from .cases import MatrixSpec, Product, Spec
from .session import prove
from .verdict import Verdict, identity, machine

__all__ = ["MatrixSpec", "Product", "Spec", "Verdict", "identity", "machine", "prove"]
