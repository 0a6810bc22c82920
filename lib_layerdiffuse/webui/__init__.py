"""Web UIs of the A1111 family: their jobs, hooks, gallery, page and routes."""
