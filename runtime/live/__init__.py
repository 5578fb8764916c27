"""Real engines behind the controller: node agents, and the backend that speaks to them."""
