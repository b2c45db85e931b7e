"""What the paper-size models cost: operations, time, memory."""
