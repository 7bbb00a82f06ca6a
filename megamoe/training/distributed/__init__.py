"""What frameworks need around a layer that trains: DTensors, norms of gradients over ranks, replicas."""
