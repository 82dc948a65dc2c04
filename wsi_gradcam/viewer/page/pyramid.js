// Pictures in tiles, for OpenSeadragon: exact also where sizes are no multiples.

/**
 * A tile source of `height` x `width` px in levels of halves, finest 0. OpenSeadragon squeezes the last tiles of a level
 * into the picture's fractional size; ours reach beyond it, as their pixels do, so that nothing is shifted.
 */
export function pyramid({ height, width, levels, tilePx, url, name }) {
  const source = new OpenSeadragon.TileSource({
    width,
    height,
    tileSize: tilePx,
    tileOverlap: 0,
    minLevel: 0,
    maxLevel: levels - 1,
    ready: true,
  });
  const shrink = (level) => 2 ** (levels - 1 - level);
  source.getTileUrl = (level, x, y) => url(levels - 1 - level, y, x);
  source.getTileHashKey = (level, x, y) => `${name}:${level}/${x}_${y}`;
  source.getTileBounds = (level, x, y, isSource) => {
    const widthPx = Math.min(tilePx, Math.ceil(width / shrink(level)) - x * tilePx);
    const heightPx = Math.min(tilePx, Math.ceil(height / shrink(level)) - y * tilePx);
    if (isSource) return new OpenSeadragon.Rect(0, 0, widthPx, heightPx);
    const scale = shrink(level) / width;
    return new OpenSeadragon.Rect(x * tilePx * scale, y * tilePx * scale, widthPx * scale, heightPx * scale);
  };
  return source;
}
