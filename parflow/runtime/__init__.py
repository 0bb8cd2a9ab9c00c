"""What acts: workers, the sandbox, clusters, the executor and its simulator."""
