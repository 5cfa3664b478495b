// Where the nodes of a search tree stand. No drawing here.
const MANY = 40;  // nodes shown before the less visited ones are folded away

// What a node adds to the text of its parent.
function piece(node, parent) {
  let same = 0;
  while (same < parent.text.length && parent.text[same] === node.text[same]) same++;
  return node.text.slice(same);
}

function total(node) {
  return node.children.reduce((sum, child) => sum + total(child), 1);
}

// The committed nodes of tree `index`: its chosen one, and those chosen later that this tree has already. node -> step
function committedPath(trees, index) {
  const path = new Map();
  let node = trees[index].root;
  for (let step = index; step < trees.length && node; step++) {
    node = node.children.find((child) => child.slot === trees[step].chosen);
    if (node) path.set(node, step);
  }
  return path;
}

// The fewest visits that keep a node in sight: 1, or more while too many nodes have them.
function leastVisits(root, path) {
  for (let least = 1; ; least++) {
    const shown = (node) => node.children.reduce((sum, child) => sum + (path.has(child) || child.visits >= least ? shown(child) : 0), 1);
    const left = shown(root);
    if (left <= MANY || left <= path.size + 1) return least;
  }
}

// Rows and columns: a parent stands in the row of its first child; committed nodes come first, then the most visited.
// Returns items {node, parent, children, depth, row, few, folded}: `few` children have too few visits, `folded` of them are not shown.
function place(root, path, least, open) {
  const items = [];
  let rows = 0;
  function put(node, parent, depth) {
    const item = { node, parent, depth, row: rows, children: [] };
    items.push(item);
    const ordered = [...node.children].sort((a, b) => path.has(b) - path.has(a) || b.visits - a.visits || b.prior - a.prior);
    const kept = ordered.filter((child) => path.has(child) || child.visits >= least);
    const shown = open.has(node) ? ordered : kept;
    item.few = ordered.length - kept.length;
    item.folded = ordered.length - shown.length;
    shown.forEach((child, i) => {
      if (i) rows++;
      item.children.push(put(child, item, depth + 1));
    });
    return item;
  }
  put(root, null, 0);
  return items;
}
