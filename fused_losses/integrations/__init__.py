"""Inside other people's trainers, one module per library; each imports its library only when called, but for Axolotl's."""
