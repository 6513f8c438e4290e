"""Once a corpus: embed it, cluster it, and measure how far the clusters can be trusted."""
