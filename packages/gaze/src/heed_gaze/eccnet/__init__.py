"""eccNET: visual search by the features of VGG16 behind an eccentric retina."""
