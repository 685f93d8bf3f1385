"""What the scripts need from the machine: the console, files, locks, the device, processes."""
