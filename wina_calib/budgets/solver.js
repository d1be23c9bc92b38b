// The same mathematics as solve.py, operation by operation, so that page and command agree to rounding.
// A cell is numbered layer * sites + site; pins[cell] is a number or null.
const WinaSolver = (() => {
  "use strict";
  const TIE = 1e-12;
  const NARROW = 1e-12;
  const clip = (value, low, high) => Math.min(Math.max(value, low), high);
  const sum = (values) => values.reduce((total, value) => total + value, 0);

  // Loss rise of one cell, linear between levels.
  function lossAt(data, cell, sparsity) {
    const { levels } = data;
    const loss = data.loss[cell];
    let left = 0;
    while (left < levels.length - 2 && levels[left + 1] <= sparsity) left += 1;
    const share = (sparsity - levels[left]) / (levels[left + 1] - levels[left]);
    return Math.max(loss[left] + share * (loss[left + 1] - loss[left]), 0);
  }

  const lossOf = (data, values) => sum(values.map((value, cell) => lossAt(data, cell, value)));
  // Loss rise of the whole for the sum of its cells' rises, through the measured pairs in their logarithms.
  function whole(data, rise) {
    const pairs = data.measured.map((pair) => pair.map(Math.log));
    if (!pairs.length || rise <= 0) return rise;
    const at = clip(Math.log(rise), pairs[0][0], pairs[pairs.length - 1][0]);
    let right = 0;
    while (pairs[right][0] < at) right += 1;
    const [x, y] = pairs[right];
    if (right === 0) return rise * Math.exp(y - x);
    const [before, under] = pairs[right - 1];
    const share = (at - before) / (x - before);
    return rise * Math.exp((1 - share) * (under - before) + share * (y - x));
  }

  const weighted = (data, values) => sum(values.map((value, cell) => data.weights[cell] * value));
  const modelSparsity = (data, values) => weighted(data, values) / sum(data.weights);

  function readFraction(data, sparsity, withHead) {
    const sparse = sum(data.weights);
    const head = withHead ? data.lm_head : 0;
    const always = data.other_decoder + head * data.head_share + data.runtime_matrices;
    return (sparse * data.share * (1 - sparsity) + always) / (sparse + data.other_decoder + head);
  }

  function sparsityAt(data, fraction) {
    const sparse = sum(data.weights);
    const always = data.other_decoder + data.lm_head * data.head_share + data.runtime_matrices;
    return 1 - (fraction * (sparse + data.other_decoder + data.lm_head) - always) / (sparse * data.share);
  }

  function totals(data, values) {
    const sparsity = modelSparsity(data, values);
    const read = readFraction(data, sparsity, true);
    const loss = whole(data, lossOf(data, values));
    return {
      model_sparsity: sparsity,
      read_fraction: read,
      read_fraction_decoder: readFraction(data, sparsity, false),
      speedup_limit: 1 / read,
      loss_rise: loss,
      perplexity_rise: Math.expm1(Math.min(loss, 700)),
    };
  }

  function lowerHull(x, y) {
    const hull = [];
    for (let point = 0; point < x.length; point += 1) {
      while (hull.length >= 2) {
        const [a, b] = hull.slice(-2);
        if ((y[b] - y[a]) * (x[point] - x[b]) < (y[point] - y[b]) * (x[b] - x[a])) break;
        hull.pop();
      }
      hull.push(point);
    }
    return hull;
  }

  function segmentsOf(data, lower, upper) {
    const found = [];
    data.weights.forEach((weight, cell) => {
      const [low, high] = [lower[cell], upper[cell]];
      if (high - low <= NARROW) return;
      const x = [low];
      const y = [lossAt(data, cell, low)];
      data.levels.forEach((level, index) => {
        if (level > low + NARROW && level < high - NARROW) {
          x.push(level);
          y.push(data.loss[cell][index]);
        }
      });
      x.push(high);
      y.push(lossAt(data, cell, high));
      const hull = lowerHull(x, y);
      for (let k = 0; k + 1 < hull.length; k += 1) {
        const length = x[hull[k + 1]] - x[hull[k]];
        found.push({ price: (y[hull[k + 1]] - y[hull[k]]) / (length * weight), cell, length });
      }
    });
    found.sort((a, b) => a.price - b.price);
    const groups = [];
    let first = 0;
    for (const segment of found) {
      if (!groups.length || segment.price > first + TIE * Math.abs(first)) {
        first = segment.price;
        groups.push({ segments: [], size: 0 });
      }
      const group = groups[groups.length - 1];
      group.segments.push(segment);
      group.size += segment.length * data.weights[segment.cell];
    }
    return groups;
  }

  function buy(data, lower, upper, groups, sparsity) {
    let wanted = sparsity * sum(data.weights) - weighted(data, lower);
    const values = lower.slice();
    for (const group of groups) {
      const share = clip(wanted / group.size, 0, 1);
      if (share <= 0) break;
      for (const { cell, length } of group.segments) values[cell] += share * length;
      wanted -= group.size;
    }
    return values.map((value, cell) => clip(value, lower[cell], upper[cell]));
  }

  function level(data, lower, upper, sparsity) {
    if (lower.every((value) => value <= sparsity) && upper.every((value) => value >= sparsity)) {
      return lower.map(() => sparsity);
    }
    const wanted = sparsity * sum(data.weights);
    const at = (mark) => lower.map((low, cell) => clip(mark, low, upper[cell]));
    const marks = [...new Set([...lower, ...upper])].sort((a, b) => a - b);
    if (marks.length === 1) return lower.slice();
    const reached = marks.map((mark) => weighted(data, at(mark)));
    let right = reached.findIndex((value) => value >= wanted);
    right = clip(right < 0 ? marks.length - 1 : right, 1, marks.length - 1);
    const rise = reached[right] - reached[right - 1];
    const share = rise > 0 ? clip((wanted - reached[right - 1]) / rise, 0, 1) : 1;
    return at(marks[right - 1] + share * (marks[right] - marks[right - 1]));
  }

  // Everything that depends on pins only; then budgets for many targets are cheap.
  function prepare(data, pins) {
    const lower = data.lower.map((value, cell) => pins[cell] ?? value);
    const upper = data.upper.map((value, cell) => pins[cell] ?? value);
    const range = [modelSparsity(data, lower), modelSparsity(data, upper)];
    const groups = segmentsOf(data, lower, upper);
    const uniform = (sparsity) => level(data, lower, upper, clip(sparsity, ...range));

    function at(sparsity) {
      const inside = clip(sparsity, ...range);
      const bought = buy(data, lower, upper, groups, inside);
      const flat = uniform(inside);
      const [boughtLoss, flatLoss] = [lossOf(data, bought), lossOf(data, flat)];
      return flatLoss < boughtLoss - 1e-12 * Math.max(1, boughtLoss) ? flat : bought;
    }

    // Highest sparsity whose predicted loss rise is within `limit`; null when there is none.
    function within(limit) {
      let [low, high] = range;
      const loss = (sparsity) => whole(data, lossOf(data, at(sparsity)));
      if (loss(low) > limit + 1e-12) return null;
      if (loss(high) <= limit) return high;
      for (;;) {
        const middle = (low + high) / 2;
        if (!(low < middle && middle < high) || high - low < 1e-13) return low;
        if (loss(middle) <= limit) low = middle;
        else high = middle;
      }
    }

    return { range, at, uniform, within };
  }

  return { lossAt, lossOf, totals, modelSparsity, sparsityAt, prepare };
})();
