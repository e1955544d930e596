"""From torch modules to a bundle of verified engines: `export.build.build_bundle` runs the stages in order."""
