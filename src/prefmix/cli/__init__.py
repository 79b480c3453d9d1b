"""The command line: one file per verb; a verb parses its arguments and calls one public function."""
