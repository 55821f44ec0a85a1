"""What one step does on the device."""
