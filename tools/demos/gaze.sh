# Sourced by tools/demo with the function `heed` and the folder `$out`: scanpaths over shelves and visual search,
# on data that it makes itself.
heed sample oat "$out/shelves"
heed train oat --data "$out/shelves" --out "$out/oat" --trainer.max-epochs 10 --quiet
heed evaluate "$out/oat" --data "$out/shelves"
heed explain "$out/oat" "$out/shelves/images/shelf-00.png" --data.grid 3 9 --data.target 5 --out "$out/seen/shelf"
heed ceiling "$out/shelves" --no-maps --out "$out/ceiling"
heed view "$out/shelves" --out "$out/views"
heed train eccnet --out "$out/eccnet" --trainer.max-epochs 12 --quiet
heed evaluate "$out/eccnet"
heed explain "$out/eccnet" "$out/eccnet/sample/objectarray" --out "$out/seen/search"
heed predict "$out/eccnet" "$out/eccnet/sample/intersection/cross" --out "$out/searches"
heed stimuli --experiments 1 --trials 2 --out "$out/stimuli"
echo
echo "Pictures to look at:"
find "$out/oat" "$out/seen" "$out/ceiling" "$out/eccnet" "$out/searches" "$out/views" -name '*.png' -not -path '*/sample/*' |
    sort | head -n 30
