"""What the suites run on: drawn and real images, maps, teachers, batches, and a network of stock operators."""
