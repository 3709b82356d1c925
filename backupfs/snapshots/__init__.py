"""The backed-up world: nodes, trees, snapshots."""
