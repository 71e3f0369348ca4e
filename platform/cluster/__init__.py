"""Ray clusters: connections and jobs from your machine, and services on the nodes."""
