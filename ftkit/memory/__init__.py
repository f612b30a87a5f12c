"""The planner: exact counts from the meta device, a stated activation formula, and the choice of batch × accumulation."""
