"""What good data is: rules over the manifest, and the pages that show what they found."""
