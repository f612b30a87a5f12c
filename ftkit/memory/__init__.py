"""The planner: exact counts from the meta device, a traced step at any batch and length, and the choice of batch × accumulation."""
