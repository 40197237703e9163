// A browser that does what it is told: a line of JSON for each thing to do, and one for
// what became of it.
import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const [modules, profile] = process.argv.slice(2);
const { chromium } = createRequire(modules + "/")("playwright-core");
const browser = await chromium.launchPersistentContext(profile, {
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  headless: true,
  viewport: { width: 1280, height: 800 },
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});
const page = browser.pages()[0] ?? (await browser.newPage());
const faults = [];
page.on("pageerror", (e) => faults.push(String(e)));
page.on("console", (m) => {
  // An answer without the token is what the page begins with.
  if (m.type() === "error" && !m.text().includes("401")) faults.push(m.text());
});
const timeout = 20_000;
const deeds = {
  go: ({ url }) => page.goto(url),
  see: ({ text, in: where }) => page.locator(where ?? "body").filter({ hasText: new RegExp(text) }).first().waitFor({ timeout }),
  gone: ({ text, in: where }) => page.locator(where ?? "body").filter({ hasText: new RegExp(text) }).first().waitFor({ state: "detached", timeout }),
  click: ({ role, name }) => page.getByRole(role, { name }).first().click({ timeout }),
  fill: ({ label, text }) => page.getByLabel(label).first().fill(text, { timeout }),
  press: ({ key }) => page.keyboard.press(key),
  eval: ({ js }) => page.evaluate(js),
  size: ({ width, height }) => page.setViewportSize({ width, height }),
  shot: ({ path }) => page.screenshot({ path }),
  faults: () => faults.splice(0),
};
console.log(JSON.stringify({ value: "ready" }));
for await (const line of createInterface({ input: process.stdin })) {
  const order = JSON.parse(line);
  try {
    const value = await deeds[order.do](order);
    console.log(JSON.stringify({ value: typeof value === "object" && !Array.isArray(value) ? null : value ?? null }));
  } catch (e) {
    console.log(JSON.stringify({ error: String(e).slice(0, 600), faults }));
  }
}
await browser.close();
