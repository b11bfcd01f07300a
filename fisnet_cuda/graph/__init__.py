"""Tracing a model into a relevance program: capture, normalise, lower, fuse, plan, run. Knows no variants and no losses."""

from .ir import Graph, Instr, Node
from .lower import StreamSpec
from .program import Plan, Program, Row, build_graph, build_graphs

__all__ = ["Graph", "Instr", "Node", "Plan", "Program", "Row", "StreamSpec", "build_graph", "build_graphs"]
