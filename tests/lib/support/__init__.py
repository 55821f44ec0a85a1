"""What tests share: cases, small models, naive twins of the reference, planted faults."""
