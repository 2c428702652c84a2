"""From a training run to a bundle that can be served: graphs, resources, proof, description, model card."""
