"""Tables and figures, and the published numbers beside them."""
