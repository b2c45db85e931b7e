"""Training: one loop (`fit`) for every stage; stages differ in their step function only."""
