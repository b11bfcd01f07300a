"""Variants (what is explained), the heatmap loss, C1/C2 tuning, and the module that composes them. Knows no graph nodes."""
