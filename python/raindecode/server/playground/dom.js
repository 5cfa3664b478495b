"use strict";
const $ = (id) => document.getElementById(id);

// Texts of models and of the server reach the page through these two and append(): as text, never as markup.
function make(tag, names, ...inside) {
  const node = document.createElement(tag);
  if (names) node.className = names;
  node.append(...inside);
  return node;
}

function shape(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// A message in an element of role alert; no message hides it.
function warn(node, message) {
  node.textContent = message ?? "";
  node.hidden = !message;
}

const signed = (value) => {
  const text = Math.abs(value).toFixed(2);
  return (Number(text) === 0 ? "" : value < 0 ? "−" : "+") + text;
};
const percent = (share) => `${(100 * share).toFixed(share < .0095 ? 1 : 0)} %`;
const count = (number) => Number.isInteger(number) ? number.toLocaleString("en") : number.toFixed(1);
const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;
const seconds = (milliseconds) => `${(milliseconds / 1000).toFixed(milliseconds < 9995 ? 2 : 1)} s`;

// Characters that would be invisible, or turn the reading order of what follows, are written out.
const escaped = (character) => `⟦U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟧`;
function visible(text) {
  return text
    .replace(/\r\n|[\n\r\u2028\u2029]/g, "↵").replace(/\t/g, "⇥")
    .replace(/[\u0000-\u001f]/g, (character) => String.fromCharCode(0x2400 + character.charCodeAt(0)))
    .replace(/[\u007f-\u009f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g, escaped);
}
const named = (text) => text === "" ? "∅" : visible(text).replace(/ /g, "␣");

// At most so many columns of a fixed-width font: characters of East Asia and pictures take two.
const WIDE = /[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff60]|[^\u0000-\uffff]/u;
function cut(text, columns) {
  let used = 0, kept = "";
  for (const character of text) {
    used += WIDE.test(character) ? 2 : 1;
    if (used > columns) return `${kept}…`;
    kept += character;
  }
  return kept;
}

// Copy text; pages of other machines over plain HTTP have no clipboard, so there the text is selected and the old command tried.
async function copy(text, shown) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    getSelection().selectAllChildren(shown);
    return document.execCommand("copy");
  }
}
