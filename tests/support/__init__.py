"""What tests of several modules share: tiny experiments, stand-ins, the command line in this process, kills."""
